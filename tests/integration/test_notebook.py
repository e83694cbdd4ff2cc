"""A training in a notebook: its bar, and what the stop button leaves. The kernel is a real one."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

SETUP = """
from sklearn.datasets import load_digits
from cvae_dist import CompressionVAE
embedder = CompressionVAE(load_digits().data, multi_start=False, cells_encoder=(16,))
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(startup_timeout=60)
    client.execute_interactive(SETUP, output_hook=lambda message: None, timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs(client: BlockingKernelClient, code: str, on_output: Any = lambda message: None) -> list[dict[str, Any]]:
    """Execute a cell and return the messages it gave."""
    messages: list[dict[str, Any]] = []

    def hear(message: dict[str, Any]) -> None:
        messages.append(message)
        on_output(message)

    client.execute_interactive(code, output_hook=hear, timeout=60)
    return messages


def texts(messages: list[dict[str, Any]], kind: str) -> list[str]:
    return [message["content"]["data"]["text/plain"] for message in messages if message["msg_type"] == kind]


def test_one_line_that_is_replaced(kernel: tuple[KernelManager, BlockingKernelClient]) -> None:
    messages = outputs(kernel[1], "embedder.train(num_steps=60)")
    assert texts(messages, "display_data") == [""]
    assert "60/60 steps" in texts(messages, "update_display_data")[-1]
    assert len(texts(messages, "execute_result")[0]) < 120


def test_the_stop_button_leaves_a_usable_model(kernel: tuple[KernelManager, BlockingKernelClient]) -> None:
    manager, client = kernel
    pressed: list[float] = []

    def press(message: dict[str, Any]) -> None:
        if message["msg_type"] == "update_display_data" and not pressed:
            pressed.append(time.monotonic())
            manager.interrupt_kernel()

    messages = outputs(client, "embedder.train(num_steps=1_000_000)", press)
    assert [message["content"]["ename"] for message in messages if message["msg_type"] == "error"] == [
        "KeyboardInterrupt"
    ]
    assert "the best weights so far are the model" in texts(messages, "update_display_data")[-1]
    used = outputs(client, "embedder.stopped_because_, embedder.embed(embedder.X).shape")
    assert texts(used, "execute_result") == ["('interrupted', (1797, 2))"]
