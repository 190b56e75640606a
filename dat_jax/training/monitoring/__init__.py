"""Monitoring of training: metrics, throughput, memory, input stalls, loss spikes and profiles."""
