"""The engine on DeepSpeed. Only this folder imports DeepSpeed, and only `patches` replaces private parts of it."""
