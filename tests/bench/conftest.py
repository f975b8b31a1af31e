import pytest

from localgpt_core.bench import peak


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The best rate of the machine from products that take no time."""
    monkeypatch.setattr(peak, "SIZES", {"cpu": (8, 16), "cuda": (8,)})
    monkeypatch.setattr(peak, "SECONDS", 1e-4)
