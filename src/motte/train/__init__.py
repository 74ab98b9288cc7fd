"""Training: data, the loop, checkpoints and logs, with a protected model or a plain one."""
