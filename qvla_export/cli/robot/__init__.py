"""Help panel *Robot*: serve, run, record, replay; what a machine's settings cost."""
