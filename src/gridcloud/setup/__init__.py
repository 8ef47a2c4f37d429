"""How a machine becomes ready: what it is told at its first boot, its end, and playbooks after."""
