"""A trained run elsewhere: predict and export."""
