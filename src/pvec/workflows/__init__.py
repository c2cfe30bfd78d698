"""What each command does: ``run(settings, …)`` → a result. No printing, no options."""
