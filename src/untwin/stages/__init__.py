"""The steps of the job: each reads with `storage`, computes with `core`, and writes with `storage`."""
