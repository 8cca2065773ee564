"""What Python finds first in the processes that tests start: as where MLflow, an extra, is not installed.

DeepSpeed's autotuner, which nothing here calls, imports it wherever it is: two seconds of each launcher and each rank.
"""

raise ImportError("not among what tests start; PYTHONPATH='' has it there")
