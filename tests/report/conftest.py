"""Every test of a figure starts with none open: pyplot keeps them, and warns of more than 20."""

import pytest


@pytest.fixture(autouse=True)
def no_open_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")
