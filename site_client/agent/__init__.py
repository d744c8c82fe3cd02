"""The agent: the network and the keys, and no slides. It asks what the site approved before it passes anything on."""
