"""What a run may be told: the schema of ``conf/``, its checks, its identity."""
