"""Whether what `mpp.plan` counts is what there is, and the tables of docs/memory.md."""
