"""Roles of settings: what an optimizer reads, what a resumed run may change, what the report shows."""

READ_BY = {
    "adamw": ("weight_decay",),
    "sgd": ("sgd_momentum", "weight_decay"),
    "muon": ("sgd_lr", "head_lr", "momentum", "sgd_momentum", "sgd_weight_decay"),
}
"""The settings of the model that each optimizer reads, next to lr."""

# -- resume; a setting that is in none of these sets may change -------------------------------------------------------

FIXED = {
    "model.name",
    "model.model_kwargs",
    "model.optimizer",
    "model.schedule",
    "model.ema_decay",
    "model.pretrained",
    "data.image_size",
    "data.dataset",
    "data.seed",
    "data.val_fraction",
    "data.limit",
}
"""Settings that the weights, the states of optimizer and schedule, or the split depend on."""

MAKES_BATCHES = {
    "data.batch_size",
    "data.drop_last",
    "data.train_sizes",
    "data.sampler",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "trainer.accumulate_grad_batches",
}
"""Settings that an epoch's batches and steps depend on.

trainer.devices is not among them: the start of an epoch may move to other devices, and within an epoch `rng_state`
checks the number of processes.
"""

PLANS_SCHEDULE = {
    "data.batch_size",
    "data.drop_last",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "trainer.accumulate_grad_batches",
    "model.lr",
    "model.sgd_lr",
    "model.head_lr",
    "model.pct_start",
    "model.stem_train_fraction",
}
"""Settings that the learning rates of later steps depend on. Momentum and decay follow no schedule."""

# -- report -----------------------------------------------------------------------------------------------------------

AUGMENTATION_SHOWN = ("train_sizes", "crop_padding_px", "flip", "cutout_px", "brightness", "contrast")
"""Settings of the data that the report lists under Augmentation, on or off."""

NOT_AUGMENTATION = {
    "dataset",
    "root",
    "batch_size",
    "image_size",
    "val_fraction",
    "limit",
    "class_weights",
    "sampler",
    "num_workers",
    "seed",
    "eval_batch_size",
    "crop_mode",
    "drop_last",
    "device",
    *AUGMENTATION_SHOWN,
}
"""Settings of the data that the report does not list where they are on; it lists every other one."""
