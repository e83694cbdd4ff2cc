"""The colours of all pictures.

The classes' colours were found by a search over sRGB for the largest distance between the two nearest of them, in Oklab
(Ottosson, "A perceptual color space for image processing", 2020), as seen normally and through the simulations of
deuteranopia, protanopia and tritanopia of Machado, Oliveira and Fernandes ("A Physiologically-based Model for
Simulation of Color Vision Deficiency", 2009, severity 1). To every sight the two nearest of the first 10 are at least
0.14 apart, and of all 20 at least 0.07. None is nearer than 0.06 to white or to a grey of this module, nor darker or
paler than a point on white may be.
"""

PALETTE = (
    "#5a4bf0",
    "#e15a0f",
    "#4bc3a5",
    "#a50000",
    "#ffd22d",
    "#690f5a",
    "#b487ff",
    "#965a96",
    "#2d00b4",
    "#4bf0ff",
    "#a5e196",
    "#c3b41e",
    "#872d69",
    "#7878d2",
    "#b45a5a",
    "#5a4ba5",
    "#e18769",
    "#005a2d",
    "#f096e1",
    "#5a0f87",
)
INK = PALETTE[0]  # what has no class
OTHER_COLOUR = "#909090"  # classes that were put together, and what is not in the foreground
NO_LABEL_COLOUR = "#d4d4d4"
CONTINUOUS = "viridis"
