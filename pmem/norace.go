//go:build !race

package pmem

const raceDetector = false
