//! Virtio, device side: the split virtqueue, the descriptor walk, the block device. Knows nothing of NVMe.
