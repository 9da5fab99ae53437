#include "textflag.h"

// func cleanToPersistence(start, end, line uintptr)
TEXT ·cleanToPersistence(SB), NOSPLIT, $0-24
	MOVD start+0(FP), R0
	MOVD end+8(FP), R1
	MOVD line+16(FP), R2

next:
	WORD $0xD50B7C20 // DC CVAP, R0
	ADD  R2, R0
	CMP  R1, R0
	BLO  next
	RET

// func cleanToCoherency(start, end, line uintptr)
TEXT ·cleanToCoherency(SB), NOSPLIT, $0-24
	MOVD start+0(FP), R0
	MOVD end+8(FP), R1
	MOVD line+16(FP), R2

next:
	WORD $0xD50B7A20 // DC CVAC, R0
	ADD  R2, R0
	CMP  R1, R0
	BLO  next
	RET

// func cacheType() uint64
TEXT ·cacheType(SB), NOSPLIT, $0-8
	MRS  CTR_EL0, R0
	MOVD R0, ret+0(FP)
	RET

// func fence()
TEXT ·fence(SB), NOSPLIT, $0-0
	DSB $15 // SY
	RET
