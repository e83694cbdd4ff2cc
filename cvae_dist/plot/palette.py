"""The colours of all pictures."""

# Found by farthest-point search over sRGB in Oklab (Ottosson 2020), as seen normally and through the simulations of
# deuteranopia and protanopia of Machado et al. (2009). Each colour is as far as possible from those before it. To the
# colour-blind the two nearest of all 20 are further apart than the two nearest of matplotlib's tab10.
PALETTE = (
    "#a53c00",
    "#0000ff",
    "#00ff00",
    "#87d2ff",
    "#780096",
    "#006969",
    "#a5a51e",
    "#ff1eb4",
    "#ffa5a5",
    "#7878ff",
    "#d278e1",
    "#00a569",
    "#4b00c3",
    "#4b3c69",
    "#00f0e1",
    "#87e169",
    "#6987b4",
    "#87003c",
    "#d20fe1",
    "#ff5a69",
)
INK = "#2f5597"
OTHER_COLOUR = "#b0b0b0"
CONTINUOUS = "viridis"
