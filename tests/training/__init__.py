"""The training program of `torchtower.training`."""
