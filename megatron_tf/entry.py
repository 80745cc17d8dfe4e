"""The console command `megatron_tf`. It handles Ctrl-C before it imports anything else, so that interrupting the
slow imports prints no traceback."""

from __future__ import annotations

from megatron_tf.interrupt import end_quietly


def main() -> None:
    end_quietly()
    from megatron_tf.__main__ import main as run_named_command

    run_named_command()
