"""Deployments: definitions, jobs, schedules, profiles, the command line. The only room that reads the environment."""
