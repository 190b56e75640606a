"""What is observed during training: metrics, throughput, memory, input stalls, loss spikes and profiles."""
