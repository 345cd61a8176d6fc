"""quiet_transformers gives the library its voice back."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from photon.models.quiet import quiet_transformers


def test_everything_is_as_before_even_after_an_error() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    inside = []

    def fail() -> None:
        with quiet_transformers():
            inside.append((logging.get_verbosity(), logging.is_progress_bar_enabled()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(logging.ERROR, False)]
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_errors_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.get_logger("transformers.photon_test")
    logging.enable_propagation()
    try:
        with quiet_transformers():
            logger.warning("chatter")
            logger.error("a fault")
    finally:
        logging.disable_propagation()
    assert {record.message for record in caplog.records} == {"a fault"}


def test_bars_may_stay_for_a_download() -> None:
    before = logging.is_progress_bar_enabled()
    with quiet_transformers(progress=True):
        assert logging.is_progress_bar_enabled() == before
