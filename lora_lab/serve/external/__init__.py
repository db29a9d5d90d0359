"""Another program answers (`serve.engine`): it is started with the runs' exports, compared with them, and asked for every answer."""
