"""The engine on torch alone: fully sharded data parallelism, and torch's pipeline schedules."""
