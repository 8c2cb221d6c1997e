"""What training shows of its own statistics: recovery, drift, history, forecast."""
