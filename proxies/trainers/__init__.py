"""The trainers that a study file may name as `[trainer] use`: a family of proxies, or any command. It may import
everything from `config` to `training`.
"""
