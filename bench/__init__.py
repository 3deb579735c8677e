"""How fast ksm is, beside plain memory reading, the kernel's ksmd and what else could be used: `python -m bench`."""
