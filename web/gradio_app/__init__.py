"""The trainer in a browser of its own: `./mapo ui`. One file per page; the work is mapo_core's."""
