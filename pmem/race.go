//go:build race

package pmem

// raceDetector: it does not see what assembly stores.
const raceDetector = true
