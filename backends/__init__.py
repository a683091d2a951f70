"""Storage backends, one file each, independent of each other. The contract is `ckptstore.protocol.Backend`."""

if __name__ != "ckptstore.backends":
    raise ImportError("this folder is the package ckptstore.backends; import it under that name")
