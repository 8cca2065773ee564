"""The dataset formats: a module with a ``FORMAT`` is one ``dataset=`` option (:mod:`harness.workload.catalogue`)."""
