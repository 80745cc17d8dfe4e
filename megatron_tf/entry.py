"""The console command `megatron_tf`: Control-C is quiet from its first instruction on, while modules are still
loaded."""

from __future__ import annotations

from megatron_tf.interrupt import end_quietly


def main() -> None:
    end_quietly()
    from megatron_tf.__main__ import main as run_named_command

    run_named_command()
