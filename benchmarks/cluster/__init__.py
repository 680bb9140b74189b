"""Real clusters on one machine: nodes in namespaces, their faults, and the stages that must survive them."""
