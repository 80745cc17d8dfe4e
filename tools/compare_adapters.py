"""The command `megatron_tf compare-adapters`, as a file to start."""

from __future__ import annotations

if __name__ in ("__main__", "__mp_main__"):
    from megatron_tf.interrupt import end_quietly

    end_quietly()

if __name__ == "__main__":
    from megatron_tf.__main__ import run

    run("compare-adapters")
