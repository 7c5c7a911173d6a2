"""What a study file may name as `[trainer] use`: proxies of our own, and any command. Imports the rooms `config` to `training`."""
