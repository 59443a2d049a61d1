"""Only what is listed is silenced."""

import warnings

import pytest

from cifar_lightning.training.quiet_lightning import quiet


def test_what_cannot_be_acted_on_is_silent_and_the_rest_is_heard():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warnings.warn("The dirpath has changed from 'a' to 'b'", stacklevel=1)
            with pytest.raises(UserWarning, match="something else"):
                warnings.warn("something else", stacklevel=1)
