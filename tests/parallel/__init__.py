"""What `torchtower.TowerParallel` promises, a file a promise, on CPU towers; tests/accelerator has those on devices."""
