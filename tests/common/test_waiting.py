"""Waiting for a device before the clock is read."""

import pytest
import torch

from localgpt_core.common.environment import wait_for


@pytest.mark.parametrize(("device", "waited_for"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_the_device_that_is_timed_is_waited_for_and_no_other(device, waited_for, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    wait_for(torch.device(device))
    assert asked == waited_for
