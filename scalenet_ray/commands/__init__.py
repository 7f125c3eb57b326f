"""The commands of `scalenet-ray`: one module each, with a dataclass of its flags and `main(job) -> int`."""
