"""Deployments: definitions, jobs, schedules, profiles, the command line.

The only room that reads fourmill's own environment variables (`environment`).
"""
