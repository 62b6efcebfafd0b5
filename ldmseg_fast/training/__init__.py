"""Trains a stage, from its settings to its model folder.

From top to bottom; a file imports from lower rows only:

    loop                                   one run: data -> loss -> step -> log -> validate -> save
    checkpoints, faults, validation        resuming; what may go wrong; panoptic quality
    optimizer, estimate                    who takes the step; memory, before anything is made
    stages, shards, deepspeed_settings     what is trained; its state along the ranks
    losses, slot_matching                  what is minimised

inputs, compilation, run_log and provenance stand by themselves.
"""
