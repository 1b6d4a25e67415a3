"""What a run needs besides mathematics: durable files, a lock, fingerprints, measurements, progress and trackers."""
