"""What a config needs on devices that need not be present.

`estimate` computes memory, traffic and time from shapes alone; `search` estimates other meshes,
remat policies and microbatches; `absent_devices` stands in for the devices and has libtpu or XLA
for GPUs compile for them; `collectives` and `compiled_program` read what was compiled; `check`
compares it with the estimate.
"""
