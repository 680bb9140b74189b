"""A rehearsal on a pretended GPU: what mixes devices, lacks a kernel, or has the host wait."""
