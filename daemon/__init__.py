"""The only place that knows everything: configuration, composition root, pools, sessions, engine."""
