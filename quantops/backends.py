def info(): pass
