"""What several tests share: models, engines, whole runs and what is done to them. No test is in here."""
