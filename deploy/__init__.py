"""Where processes are placed: one machine, containers, clusters. Starts processes and imports nobody's insides."""
