import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's clients are imported, which read it then: no test waits for a network
