"""Services of a run besides its mathematics: durable files, a lock, fingerprints, measurements, progress, trackers."""
