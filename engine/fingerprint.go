package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"ublk-pcache/ondisk"
)

// Nothing tells a cache that its disk was mounted, partitioned or restored
// without it. Its clean data is out of date then and its dirty data belongs to
// something that may be gone, and serving both with what is on the disk now
// makes a mixture that never existed.
//
// A user of a disk leaves traces where it keeps its superblock or its table:
// ext4 at 1 KiB, XFS at 0, btrfs at 64 KiB, the same at the head of a first
// partition at 1 MiB; LVM, md and LUKS at either end, GPT at both. Mounting for
// writing is enough to change them. So a checksum of these areas is kept on the
// media, and compared when the cache is opened. Writes that touch none of them
// go unseen.
//
// Write-back changes the areas, too, and so may the kernel if it had the cache
// in between. The obvious way, to take the checksum when the cache is closed,
// knows nothing after a crash, just when somebody looks at the disk by hand. To
// take it after each round raises a false alarm if the crash comes between the
// round and its checksum. So:
//
//  1. Before a round writes to an area: the fingerprint is unknown, durably.
//  2. The round writes and flushes the disk.
//  3. The areas that it has written to are read again.
//  4. The fingerprint is stored, for dirty_tail as it is and as it will be.
//  5. It is made durable, and only then dirty_tail moves.
//
// A crash before 5 finds the fingerprint of the round before, an unknown one, or
// this one; a crash after it finds this one, which holds wherever dirty_tail is
// found. A round that touches no area skips 1 and 3. Step 3 reads only the areas
// that were written: the others are at the far end of the disk, and changes that
// somebody else has made there would count as the cache's own work.
//
// After a flush that failed the disk may show what it will forget, and what has been
// superseded meanwhile is not written again. So the fingerprint stays unknown until
// dirty_tail comes to the end of the log: by then each sector has been written again, or what
// superseded it has. Who finds dirty data and an unknown fingerprint knows of no flush
// that failed before, and waits as long.
//
// The kernel is seen to have written to the disk only where it moved dirty_tail
// or left a kset, one without a number, behind it. With either, nothing can be
// told: the areas may be its work, and count as they are now.
//
// Invariant: while the fingerprint on the media is known, and dirty_tail is at
// either of its two places, this program has not written to the areas since.

const (
	// sampleBytes is the size of an area: enough for btrfs at 64 KiB from the
	// head and for md 0.90, up to 128 KiB from the end.
	sampleBytes = 128 << 10
	// firstPartition is where partitioning tools put it unless told otherwise.
	firstPartition = 1 << 20
)

// Choice is what to do with a cache whose disk was written without it.
type Choice string

const (
	// Refuse does not open it if there is dirty data, and gives up the clean.
	Refuse Choice = ""
	// Overwrite writes the dirty data over what is on the disk now, and gives
	// up the clean. It does so whether or not the disk is found to be changed,
	// since not every change can be.
	Overwrite Choice = "overwrite"
	// Discard gives up all of it, if the disk is found to be changed.
	Discard Choice = "discard"
)

// fingerprint belongs to Open, and then to the thread of write-back.
type fingerprint struct {
	now      ondisk.Fingerprint // what is on the media, or will be with the next dirty_tail
	at       ondisk.Replica
	lost     bool // it cannot be stored any more
	outdated bool // the disk was written without the cache

	areas []area
	buf   []byte // what was read of them, one after the other
	stale []bool // by area: the disk may have something else

	unflushed bool   // an area was written, and no flush has succeeded since
	failures  uint64 // flushes.failed before that
	doubt     bool   // the disk may forget what it shows of the areas
}

// area is a part of the disk, in bytes.
type area struct{ off, n int64 }

func (a area) overlaps(off, n int64) bool { return a.off < off+n && off < a.off+a.n }

// sampledAreas returns the areas of a disk, in order and disjoint. Their bounds
// are multiples of its blocks, as its size is.
func sampledAreas(size int64) []area {
	places := []int64{0, firstPartition, max(0, size-sampleBytes)}
	slices.Sort(places)
	var areas []area
	end := int64(0)
	for _, off := range places {
		from, to := max(off, end), min(off+sampleBytes, size)
		if from < to {
			areas = append(areas, area{from, to - from})
			end = to
		}
	}
	return areas
}

// sample returns the checksum of the areas that the disk had when it had this
// size. It reads those that it does not know.
func (c *Cache) sample(size int64) (sum uint32, err error) {
	f := &c.fingerprint
	if f.buf == nil {
		f.buf = c.disk.Buffer(3 * sampleBytes)
	}
	f.sized(size)
	read := make(chan error, len(f.areas))
	reading, n := 0, int64(0)
	for i, a := range f.areas {
		if f.stale[i] {
			c.disk.Read(f.buf[n:n+a.n], a.off, func(err error) { read <- c.errs.diskRead(a.off, err) })
			reading++
		}
		n += a.n
	}
	for range reading {
		err = errors.Join(err, c.await(read))
	}
	if err == nil {
		clear(f.stale)
	}
	return ondisk.Checksum(f.buf[:n]), err
}

// sized is told how large the disk is, or was.
func (f *fingerprint) sized(size int64) {
	if areas := sampledAreas(size); !slices.Equal(areas, f.areas) {
		f.areas, f.stale = areas, slices.Repeat([]bool{true}, len(areas))
	}
}

// compareDisk finds out whether the disk was written without the cache, and
// refuses it if that asks for a decision. Nothing has been written yet.
func (c *Cache) compareDisk(choice Choice, foreign bool) error {
	f, size := &c.fingerprint, c.size
	f.now, f.at = c.layout.Fingerprint, c.layout.FingerprintCopies.Newest
	f.outdated = f.now.State == ondisk.FingerprintChanged
	switch {
	case f.now.State != ondisk.FingerprintKnown:
	case foreign || !slices.Contains(f.now.DirtyTail[:], c.layout.DirtyTail),
		f.now.Size < 1 || f.now.Size > size || f.now.Size%int64(c.disk.BlockSize()) != 0:
		f.now.State = ondisk.FingerprintUnknown
	default:
		sum, err := c.sample(f.now.Size)
		if err == nil && sum != f.now.Sum && slices.Contains(c.layout.FingerprintCopies.State[:], ondisk.CopyUnreadable) {
			// A torn copy was never needed; one that cannot be read may be
			// the newer one, and right.
			err = errors.New("one copy of its fingerprint cannot be read, the other one does not match")
		}
		if err != nil {
			c.log.Error(OtherEvent, "cannot tell whether the backing device was written without the cache", err)
		} else if sum != f.now.Sum {
			f.outdated = true
		}
		if err != nil || f.now.Size != size {
			f.now.State = ondisk.FingerprintUnknown
		}
	}
	f.sized(size)
	u := c.index.usage()
	f.doubt = c.layout.Fingerprint.State == ondisk.FingerprintUnknown && u.dirty+u.zero > 0
	switch {
	case !f.outdated && choice == Discard:
		return ErrUnchanged
	case f.outdated && choice == Refuse && u.dirty+u.zero > 0:
		return fmt.Errorf("%w, which holds %s", ErrChanged, ondisk.Unwritten(u.dirty, u.zero))
	}
	f.outdated = f.outdated || choice == Overwrite
	return nil
}

// readDisk takes the fingerprint of the disk while nothing is written back. It
// flushes the disk first: the last writes of a server that died may be in the
// disk's volatile cache only.
func (c *Cache) readDisk() {
	if err := c.flushDisk(c.flushes.failed.Load(), nil); err != nil {
		err = fmt.Errorf("flush the backing device: %w", err)
		c.writeback.failed(err) // until a round succeeds
		c.flushes.unsure.Store(true)
		c.log.Error(OtherEvent, "cannot take the fingerprint of the backing device", err)
		c.fingerprint.now = ondisk.Fingerprint{}
		return
	}
	c.fingerprint.flushed(c.flushes.failed.Load())
	_, cleaned := c.tails.dirtyTail()
	c.takeFingerprint(cleaned)
}

// firstFingerprint is stored when the cache is opened. The caller persists.
func (c *Cache) firstFingerprint() error {
	if c.fingerprint.outdated {
		return c.storeFingerprint(ondisk.Fingerprint{State: ondisk.FingerprintChanged})
	}
	if c.fingerprint.now.State != ondisk.FingerprintKnown {
		c.keepFingerprint(ondisk.Fingerprint{})
		return nil
	}
	tail, _ := c.tails.dirtyTail()
	c.moveFingerprint(tail)
	return nil
}

// voidFingerprint is called before parts are written to the disk. The caller
// persists.
func (c *Cache) voidFingerprint(parts []part) {
	f := &c.fingerprint
	writes := false
	for i := range parts {
		off, n := parts[i].off, int64(parts[i].len())
		for j, a := range f.areas {
			if a.overlaps(off, n) {
				f.stale[j], writes = true, true
			}
		}
	}
	if writes && !f.unflushed {
		f.unflushed, f.failures = true, c.flushes.failed.Load()
	}
	if f.now.State == ondisk.FingerprintKnown && slices.Contains(f.stale, true) {
		c.keepFingerprint(ondisk.Fingerprint{})
	}
}

// doubtful reports, when so many flushes have failed, whether the disk may forget what it shows
// of the areas even after one that succeeds.
func (f *fingerprint) doubtful(failures uint64) bool {
	return f.doubt || f.unflushed && failures != f.failures
}

// flushed is called after a flush that succeeded, when so many have failed.
func (f *fingerprint) flushed(failures uint64) {
	f.doubt, f.unflushed = f.doubtful(failures), false
}

// inDoubt reports whether the disk may forget what it shows of the areas, when dirty_tail is
// about to have passed a number of ksets.
func (c *Cache) inDoubt(cleaned uint64) bool {
	_, written := c.journal.head()
	c.fingerprint.doubt = c.fingerprint.doubt && cleaned < written
	return c.fingerprint.doubt
}

// takeFingerprint makes an unknown fingerprint known, when everything written
// to the disk has been flushed, and dirty_tail is about to have passed a number of
// ksets. It is stored with the next dirty_tail and not before: the copy of the unknown
// one must last until then.
func (c *Cache) takeFingerprint(cleaned uint64) {
	f := &c.fingerprint
	if f.lost || f.unflushed || f.now.State != ondisk.FingerprintUnknown || c.inDoubt(cleaned) {
		return
	}
	sum, err := c.sample(c.size)
	if err != nil {
		c.log.Error(OtherEvent, "cannot take the fingerprint of the backing device", err)
		return
	}
	f.now = ondisk.Fingerprint{State: ondisk.FingerprintKnown, Sum: sum, Size: c.size}
}

// moveFingerprint stores a known fingerprint for a dirty_tail that is about to
// move. The caller persists.
func (c *Cache) moveFingerprint(to ondisk.Position) {
	rec := c.fingerprint.now
	if rec.State != ondisk.FingerprintKnown {
		return
	}
	from, _ := c.tails.dirtyTail()
	rec.DirtyTail = [2]ondisk.Position{from, to}
	c.keepFingerprint(rec)
}

// RenewFingerprint stores the fingerprint of the disk as it is now. It is for a cache
// at rest (Rest) that is to be closed with dirty data: where some could not be
// written and dirty_tail has not moved, the one on the media may be unknown.
func (c *Cache) RenewFingerprint() error {
	runtime.LockOSThread() // a fence is for the stores of its own thread
	defer runtime.UnlockOSThread()
	if c.fingerprint.now.State == ondisk.FingerprintUnknown {
		c.readDisk()
	}
	tail, _ := c.tails.dirtyTail()
	c.moveFingerprint(tail)
	return c.persist()
}

// keepFingerprint stores one that can be done without. Where that is impossible
// there is none until the cache is opened again. The old one is left on the
// media, and is true only for the places of dirty_tail that it names: a crash
// before the next one makes a false alarm at worst.
func (c *Cache) keepFingerprint(rec ondisk.Fingerprint) {
	f := &c.fingerprint
	if f.lost {
		return
	}
	if err := c.storeFingerprint(rec); err != nil {
		f.lost, f.now = true, ondisk.Fingerprint{}
	}
}

// storeFingerprint does not persist. Its caller does, before it is called again,
// since the copy that it leaves alone is the last durable one.
func (c *Cache) storeFingerprint(rec ondisk.Fingerprint) error {
	f := &c.fingerprint
	at := f.at.Next()
	var buf [ondisk.FingerprintSize]byte
	off := ondisk.EncodeFingerprint(buf[:], at, &rec)
	if err := c.storeRecord("fingerprint of the backing device", noSegment, buf[:], off); err != nil {
		return err
	}
	f.now, f.at = rec, at
	return nil
}

// startOver empties a cache that is outdated, and opens it again. Until the log
// is empty the media says that the disk was changed, so that after a crash at
// any point the next Open goes on here, or asks again what to do with the dirty
// data that is left.
func (c *Cache) startOver(o Options) (*Cache, error) {
	if u := c.index.usage(); u.dirty+u.zero > 0 && o.Changed == Overwrite {
		c.start()
		err := errors.Join(c.Flush(context.Background()), c.Close())
		if left := c.index.usage(); err == nil && left.dirty+left.zero > 0 {
			err = fmt.Errorf("%w: %s are left", ErrStopped, ondisk.Unwritten(left.dirty, left.zero))
		}
		if err != nil {
			return nil, fmt.Errorf("write the dirty data over what is on the backing device: %w", err)
		}
	}
	u := c.index.usage()
	c.log.Error(DiskWasChanged, fmt.Sprintf("the cache starts empty, since its backing device was written without it: given up are %d bytes of clean data and %s", u.clean, ondisk.Unwritten(u.dirty, u.zero)), nil)

	// dirty_tail first: it must never lie before key_tail.
	head, written := c.journal.head()
	_, cleaned := c.tails.dirtyTail()
	if err := c.moveDirtyTail(head, written-cleaned); err != nil {
		return nil, err
	}
	if err := c.moveKeyTail(head); err != nil {
		return nil, err
	}
	if err := c.persist(); err != nil {
		return nil, err
	}
	if err := c.storeFingerprint(ondisk.Fingerprint{}); err != nil {
		return nil, err
	}
	if err := c.persist(); err != nil {
		return nil, err
	}
	o.Changed = Refuse
	return Open(c.mem, c.disk, o)
}
