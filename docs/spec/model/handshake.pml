/* The handshake of docs/spec/broker.md against an attacker who owns the network and the host.
 *
 *   spin -a handshake.pml && cc -O2 -DSAFETY -o pan pan.c && ./pan -E -m200000     no errors: what is asserted holds
 *   ... with -DNONCE_NOT_BOUND, KEY_NOT_BOUND, NONCE_NOT_CONSUMED or ANSWER_NOT_SIGNED given to spin too: a seeded
 *   mistake each, and the checker finds the attack. With -DREACHABLE it finds an honest run to its end.
 *
 * Cryptography is perfect (Dolev and Yao, 1983): evidence and signatures cannot be made without their key, sealed keys
 * open with the private key of the public key that they were sealed to. All else is the attacker's: every message passes
 * through its hands, and it keeps, repeats, reorders, drops and diverts them, makes questions and proofs of its own, and
 * holds a key pair of its own. The broker serves two bundles. Two genuine enclaves ask, one for each bundle.
 *
 * What is asserted:
 *   S1  nothing is ever sealed to the attacker's key
 *   S2  one nonce releases keys at most once
 *   S3  an enclave that finished holds keys of the bundle that it asked for, from the broker
 *   S4  keys are released only for evidence that an enclave made for this very bundle, after this nonce was given out
 */

#define NONCES  3          /* given out in all */

/* Names of public keys; enclave i has key i. */
#define ATTACKER 0
#define KEY_A    1
#define KEY_B    2

/* Nonces are 1 to NONCES, bundles 1 and 2; 0 is none. An enclave is committed to one bundle by its configuration. */
mtype = { ASK, CHALLENGE, PROOF, RELEASE };

/* kind, bundle, nonce, public key; then of a PROOF what its evidence says (nonce, key, bundle),
 * of a RELEASE what is sealed and to whom (bundle of the keys, key). */
chan to_broker = [0] of { mtype, byte, byte, byte, byte, byte, byte };
chan to_a      = [0] of { mtype, byte, byte, byte, byte, byte };
chan to_b      = [0] of { mtype, byte, byte, byte, byte, byte };

byte given = 0;                 /* nonces given out */
byte nonce_for[5];              /* the bundle that a nonce was given out for */
bool used[5];
byte released[5];               /* how often keys were released on it */

/* What the attacker has seen, for ever: nothing is lost to it, so it can repeat and reorder all of it at will. */
bool seen_evidence[45];         /* evidence over (nonce, key, bundle) */
bool seen_release[135];         /* a signed answer (bundle, nonce, key) with keys of (bundle) sealed to that key */
#define EVIDENCE(n, k, b)    ((n) * 9 + (k) * 3 + (b))
#define ANSWER(b, n, k, kb)  ((((n) * 3 + (k)) * 3 + (b)) * 3 + (kb))

byte made_nonce[3];             /* over what each enclave made evidence, once */
byte made_bundle[3];

active proctype Broker() {
    byte b, n, k, en, ek, eb;
    do
    :: atomic { to_broker ? ASK(b, _, _, _, _, _) ->
            if
            :: given < NONCES -> given++; nonce_for[given] = b      /* signed, and seen by the attacker */
            :: else -> skip
            fi
        }
    :: atomic { to_broker ? PROOF(b, n, k, en, ek, eb) ->
            if
            :: (n != 0 && n <= given && nonce_for[n] == b
#ifndef NONCE_NOT_CONSUMED
                && !used[n]
#endif
#ifndef NONCE_NOT_BOUND
                && en == n              /* report data binds the nonce */
#endif
#ifndef KEY_NOT_BOUND
                && ek == k              /* ... and the key */
#endif
                && eb == b) ->          /* ... and the configuration, so the bundle */
                used[n] = true;
                released[n]++;
                assert(released[n] <= 1);                               /* S2 */
                assert(k != ATTACKER);                                  /* S1 */
                assert(made_bundle[ek] == b && made_nonce[ek] == n);    /* S4 */
                seen_release[ANSWER(b, n, k, b)] = true
            :: else ->                  /* refused: the nonce is used up all the same */
                if
                :: n != 0 && n <= given -> used[n] = true
                :: else -> skip
                fi
            fi;
            b = 0; n = 0; k = 0; en = 0; ek = 0; eb = 0
        }
    od
}

/* An enclave takes one challenge, makes evidence once, takes one answer. What it sends is the attacker's at once.
 * phase: 0 waits for a challenge, 1 for an answer, 2 is over. */
byte phase[3];

inline enclave(me, mine, inbox) {
    atomic { inbox ? CHALLENGE(b, n, _, _, _) ->
        if
        :: b == mine ->                              /* H-4 */
            made_nonce[me] = n;
            made_bundle[me] = mine;
            seen_evidence[EVIDENCE(n, me, mine)] = true;
            phase[me] = 1
        :: else -> phase[me] = 2; goto over
        fi;
        b = 0
    };
    atomic { inbox ? RELEASE(b, m, k, kb, kk) ->
        if
        :: (b == mine && m == n && k == me && kk == me) ->       /* H-5, H-6 */
#ifdef REACHABLE
            assert(false);
#endif
            assert(kb == mine)                       /* S3 */
        :: else -> skip
        fi;
        phase[me] = 2; b = 0; n = 0; m = 0; k = 0; kb = 0; kk = 0
    };
over:
    skip
}

active proctype EnclaveA() {
    byte b, n, m, k, kb, kk;
    enclave(KEY_A, 1, to_a)
}

active proctype EnclaveB() {
    byte b, n, m, k, kb, kk;
    enclave(KEY_B, 2, to_b)
}

#define forget    b = 0; n = 0; k = 0; en = 0; ek = 0; eb = 0

/* The attacker: whatever it has seen or can make, to whomever it likes, in any order, any number of times.
 * Its choices are forgotten after each step: what it knows stands in seen_evidence and seen_release. */
active proctype Attacker() {
    byte b, n, k, en, ek, eb;
    do
    :: atomic { given < NONCES -> select(b : 1 .. 2); to_broker ! ASK(b, 0, 0, 0, 0, 0); forget }
    :: atomic {                                      /* a proof: any nonce, key and bundle, with evidence that exists */
            select(en : 1 .. NONCES); select(ek : 1 .. 2); select(eb : 1 .. 2);
            if
            :: seen_evidence[EVIDENCE(en, ek, eb)] ->
                select(n : 1 .. NONCES); select(k : 0 .. 2); select(b : 1 .. 2);
                to_broker ! PROOF(b, n, k, en, ek, eb)
            :: else -> skip
            fi;
            forget
        }
    :: atomic {                                      /* a challenge that the broker signed, to either enclave */
            select(n : 1 .. NONCES);
            if
            :: n <= given && phase[KEY_A] == 0 -> to_a ! CHALLENGE(nonce_for[n], n, 0, 0, 0)
            :: n <= given && phase[KEY_B] == 0 -> to_b ! CHALLENGE(nonce_for[n], n, 0, 0, 0)
            :: else -> skip
            fi;
            forget
        }
    :: atomic {                                      /* an answer that the broker signed, to either enclave */
            select(n : 1 .. NONCES); select(k : 1 .. 2); select(b : 1 .. 2);
            if
            :: seen_release[ANSWER(b, n, k, b)] && phase[KEY_A] == 1 -> to_a ! RELEASE(b, n, k, b, k)
            :: seen_release[ANSWER(b, n, k, b)] && phase[KEY_B] == 1 -> to_b ! RELEASE(b, n, k, b, k)
#ifdef ANSWER_NOT_SIGNED
            /* ... or one of its own, with keys of its own (0): anyone can seal to a public key */
            :: phase[KEY_A] == 1 -> to_a ! RELEASE(b, n, k, 0, k)
#endif
            :: else -> skip
            fi;
            forget
        }
    od
}
